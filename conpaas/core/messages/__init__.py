"""Every command and report of the protocol: `public` (people to director), `manager`, `agent`, `internal` (to director)."""
