"""Code shared by prefill and decode workers: settings, process lifecycle, legs, WorkerService, and the two roles.

The services `tandem_prefill` and `tandem_decode` add an entry point and their settings.
"""
