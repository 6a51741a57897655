"""Helpers for tests of Tandem and of programs that use it: waiting, virtual time, models without weights."""
