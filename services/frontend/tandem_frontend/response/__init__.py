"""Step 5 of a request: tokens become text, chunks, events and one finish."""
