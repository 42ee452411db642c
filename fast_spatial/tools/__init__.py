"""Commands that look at the machine or the data: doctor, check, recipes."""
