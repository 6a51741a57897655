"""Validation of long request bodies in a process of its own: a parser of JSON blocks all threads of its process.

checker   the process, as the frontend sees it: started on demand, its queue, its end
limits    how many values a body may have
__main__  the process itself
"""
