"""Commands that check the machine or the data: doctor and check-data."""
