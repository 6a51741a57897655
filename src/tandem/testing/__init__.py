"""What tests of Tandem, and of programs that use it, share: waiting for conditions, models without weights."""
