"""Runs gcp-storage-emulator with what it lacks and tensorstore asks of Cloud Storage.

That is, the generation of an object that is read, and reads and writes on the condition of one:
its checkpoints change a manifest only if nobody else has. It answers one request at a time, so
that a condition and what follows are one step; more than five may wait for it.

    python tests/gcs_emulator.py start --host=localhost --port=9023 --in-memory \
        --default-bucket=bucket
"""

import http.server
import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.__main__ import main
from gcp_storage_emulator.exceptions import NotFound


def conditional(handler):
    """The same handler of requests about one object, on a condition if the request has one."""

    def handle(request, response, storage, *arguments, **more):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            generation = "0"
        if request.query.get("ifGenerationMatch", [generation])[0] != generation:
            _ = request.data  # unread, it would break the connection
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        if request.query.get("ifGenerationNotMatch", [None])[0] == generation:
            response.status = HTTPStatus.NOT_MODIFIED
            return
        response["x-goog-generation"] = generation
        handler(request, response, storage, *arguments, **more)

    return handle


if __name__ == "__main__":
    http.server.HTTPServer.request_queue_size = 256
    about_objects = {
        getattr(server.objects, name) for name in ("get", "download", "insert", "delete")
    }
    server.HANDLERS = tuple(
        (path, {m: conditional(h) if h in about_objects else h for m, h in methods.items()})
        for path, methods in server.HANDLERS
    )
    main(sys.argv[1:])
