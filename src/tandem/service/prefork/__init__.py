"""A service on several processes: a parent that accepts connections and children that serve them."""
