"""`tandem top`: the fleet, live. `watching` follows it, `sample` is what is known, `cells` makes tables of it, `screen`
shows them on a terminal, `plain` in scripts.
"""
