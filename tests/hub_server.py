"""A stand-in of the Hugging Face hub on this machine: the calls that one model needs."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@contextmanager
def running(refuse=False):
    """Serve until the end of the block; yields (address, files by repository, requests)."""
    files, requests = {}, []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            requests.append(("POST", path))
            if refuse:
                self.answer(403, {"error": "no rights"})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                files.setdefault(name, {})
                self.answer(200, {"url": f"{address}/{name}", "name": name, "id": name})
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                asked = json.loads(body)["files"]
                told = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
                self.answer(200, {"files": told})
            elif "/commit/" in path:
                name = "/".join(path.split("/")[3:5])
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        files[name][entry["value"]["path"]] = content
                commit = {"commitUrl": f"{address}/{name}/commit/{SHA}", "commitOid": SHA}
                self.answer(200, {**commit, "hookOutput": ""})
            else:
                self.answer(404, {"error": path})

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            requests.append((self.command, path))
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            if name not in files:
                return self.answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
            if api and "tree" in parts:
                return self.answer(200, [self.entry(name, file) for file in files[name]])
            if api:
                listed = [{"rfilename": file} for file in files[name]]
                return self.answer(200, {"id": name, "sha": SHA, "siblings": listed})
            content = files[name].get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
            tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            return self.answer(200, content, tags)

        def entry(self, name, file):
            content = files[name][file]
            oid = hashlib.sha1(content).hexdigest()
            return {"type": "file", "path": file, "size": len(content), "oid": oid}

        def answer(self, code, content, headers=()):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield address, files, requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SHA = "0123456789abcdef0123456789abcdef01234567"
