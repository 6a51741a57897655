"""The registry as its clients see it: `Registration` for workers, `WorkerWatch` for whoever chooses among them."""

from tandem.discovery.lease_calls import LeaseTime
from tandem.discovery.registration import Registration
from tandem.discovery.view import WorkerView
from tandem.discovery.watch import WatchState
from tandem.discovery.watches import WorkerWatch

__all__ = ["LeaseTime", "Registration", "WatchState", "WorkerView", "WorkerWatch"]
