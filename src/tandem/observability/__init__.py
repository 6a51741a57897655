"""What a process tells of its requests: one record of each, and what is derived from it.

In reading order: trace_context, course, courses, logs; span_names, spans, tracing, otlp; names, metrics, otel, scrape;
sliding, for figures over the last seconds; profiles, cpu_profile.
"""
