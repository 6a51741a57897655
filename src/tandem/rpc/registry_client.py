"""The registry as its clients see it: `Registration` for workers, `WorkerWatch` for whoever chooses among them."""

from tandem.rpc.following import WatchState
from tandem.rpc.lease_calls import LeaseTime
from tandem.rpc.registration import Registration
from tandem.rpc.registry_view import RegistryView
from tandem.rpc.watching import WorkerWatch

__all__ = ["LeaseTime", "Registration", "RegistryView", "WatchState", "WorkerWatch"]
