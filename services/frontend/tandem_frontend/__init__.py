"""The frontend service: takes text from clients and streams text back.

In reading order: __main__, config, app, servicer, call_context, pipeline (the stages of a request in order), then the
packages of the stages: admission, preparation, routing, execution, response. Beside them: openai, admin, processes.
"""
