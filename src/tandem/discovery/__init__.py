"""Registry clients: `Registration` for workers and frontends, `WorkerWatch` for frontends that choose workers."""

from tandem.discovery.lease_calls import LeaseTime
from tandem.discovery.registration import Registration
from tandem.discovery.view import WorkerView
from tandem.discovery.watch import WatchState
from tandem.discovery.watches import WorkerWatch

__all__ = ["LeaseTime", "Registration", "WatchState", "WorkerView", "WorkerWatch"]
