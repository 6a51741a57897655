"""How every Tandem process lives: start, serve, drain, stop."""
