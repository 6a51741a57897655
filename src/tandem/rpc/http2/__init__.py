"""A gRPC server on h2, for streams of many small messages: `tandem.rpc.http2.server.Http2RpcServer`.

h2 parses what comes and keeps the protocol's state; the modules here make calls of it, and put the messages of many
calls into one write. They know nothing of the services they carry.
"""
