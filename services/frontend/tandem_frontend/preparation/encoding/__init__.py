"""Tokenisation outside of the event loop: in threads, and in processes for the longest texts.

    texts    encodes one text, in whatever thread or process
    turns    limits concurrent jobs, first come, first served
    pool     the processes for long texts, started on demand
    process  one encoding process, as the frontend sees it
    frames   the messages between the two
    __main__ the encoding process itself

This package imports none of its modules: the encoding process loads a tokenizer and almost nothing else.
"""
