"""Observability: one trace record per request or leg, and the logs, spans and metrics derived from it.

In reading order: trace_context, request_trace, trace_store, logs; span_names, spans, span_export, otlp;
metric_catalog, metrics, request_metrics, leg_metrics, otel_metrics, scrape_endpoint, merged_scrape; windows, for
percentiles and rates over the last seconds; profiles, cpu_profile.
"""
