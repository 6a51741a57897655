"""The console: a page that shows the fleet, requests and a playground, on a port of its own and behind keys."""
