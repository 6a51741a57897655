"""`tandem doctor`: what this machine has of what each part of Tandem needs, and the command that mends the rest."""
