"""A frontend with several processes: the parent, its children, and the calls by which they appear as one frontend.

Reading order: identity, parent, child, membership, siblings, sums. `tandem.service.prefork` starts
and restarts the processes.
"""
