"""`tandem top`: a live view of the fleet. `poller` follows it, `sample` holds its state, `cells` formats it, `screen`
shows it on a terminal, `plain` in scripts.
"""
