"""The names under which published SAEs and steering vectors are loaded elsewhere; all of it is `mechint.hub`."""
