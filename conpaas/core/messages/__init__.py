"""Every command and report of the protocol, by receiver: `public` and `internal` (the director), `manager`, `agent`."""
