"""How each role converts a leg to an engine request, and the services of each.

A worker serves the services of both kinds from its start, because its role can change; those of another role report
NOT_SERVING and reject legs with WRONG_ROLE.
"""
