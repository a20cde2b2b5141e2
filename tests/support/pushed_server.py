"""A server that takes pushed weights and forgets them."""

from opd.servers.control import Control, WeightsGate
from opd.servers.http_service import RequireToken, new_app

TOKEN = "a-token-of-more-than-16-characters"


class Server:
    """A server of weights that are never used."""

    def __init__(self, root, port: int = 0):
        self.port, self.gate, self.loaded = port, WeightsGate(), []
        self.control = Control(self.gate, self, root, protocol="p", token=TOKEN)

    def app(self):
        app = new_app()
        self.control.mount(app)
        return RequireToken(app, TOKEN)

    async def pause(self, mode):
        pass

    async def load(self, directory, version):
        self.loaded.append(version)

    async def resume(self):
        pass
