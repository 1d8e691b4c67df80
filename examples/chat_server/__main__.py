"""Runs the server until SIGTERM or SIGINT: ``python -m examples.chat_server``."""

import asyncio
import logging
import os

from hypercorn.asyncio import serve
from hypercorn.config import Config

from .app import create_app
from .settings import from_environment

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = from_environment(os.environ)
    config = Config()
    config.bind = [settings.bind]
    asyncio.run(serve(create_app(settings), config))
