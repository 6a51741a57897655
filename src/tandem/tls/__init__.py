"""TLS between Tandem's processes: paths of certificates, their validation and reload, and a development CA."""
