"""The sharing service: SAEs over HTTP and WebSocket, jobs in worker processes. Needs the extra `server`."""
