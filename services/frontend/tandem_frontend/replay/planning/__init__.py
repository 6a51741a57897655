"""Planning: how many workers of which role reach given goals for a load, found by replays of candidate fleets.

No part of a serving frontend. `search` chooses the candidates, `candidate` judges each, `tandem plan` is the command.
"""
