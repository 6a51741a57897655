"""A frontend with several processes: the parent, its children, and the calls by which they appear as one frontend.

Reading order: shares, identity, parent, child, membership, siblings, servicer, sums. `tandem.service.prefork` starts
and restarts the processes.
"""
