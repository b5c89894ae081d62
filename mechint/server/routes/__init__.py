"""The routes of the service, one file a part of the API."""
