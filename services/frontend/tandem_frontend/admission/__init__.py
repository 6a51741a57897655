"""Admission: a request is admitted, queued or rejected, depending on this frontend's load and the workers' capacity."""
