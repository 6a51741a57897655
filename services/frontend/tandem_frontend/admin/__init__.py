"""What operators ask of a frontend: timelines of requests and statistics."""
