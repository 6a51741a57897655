"""A frontend on several processes: the parent, its children, and what they ask each other to answer as one.

Reading order: shares, parent, child, siblings, servicer, sums. How processes are kept in general is
`tandem.service.prefork.parent`.
"""
