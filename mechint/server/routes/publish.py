"""An SAE to the Hub as a bundle: its card, its metadata, its weights and their hashes."""

from fastapi import APIRouter

router = APIRouter(tags=["publish"])
