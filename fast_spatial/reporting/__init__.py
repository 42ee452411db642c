"""The report of runs: from the files in their folders to a page of tables and figures."""
