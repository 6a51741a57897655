"""The controller: changes the roles of workers so that they follow the load.

`rule` decides, from what `figures` and `needs` make of load reports; both the process (`app`) and a replay in virtual
time (`tandem_frontend.replay.role_changes`) run this very rule. Off unless started; no request depends on it.
"""
