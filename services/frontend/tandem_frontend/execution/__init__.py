"""Step 4 of a request: its legs are started on the chosen workers, watched, retried and continued."""
