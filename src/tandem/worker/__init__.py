"""What prefill and decode workers have in common: settings, the life of the process, legs, and WorkerService.

A worker service adds its role: which call it serves, and what that call makes of a leg.
"""
