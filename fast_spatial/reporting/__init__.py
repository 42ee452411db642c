"""The report of runs: from what they left in their folders to a page of tables and figures."""
