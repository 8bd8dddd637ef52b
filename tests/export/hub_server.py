"""A small hub: what huggingface_hub asks of one to upload a folder and to download it, over HTTP on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LARGE = 10_000  # bytes


class Hub(ThreadingHTTPServer):
    """Repositories of the user `user`, each a list of commits; a commit has files by path.

    Large files are uploaded apart, as git-lfs does, unless `in_commit` is true. `requests` are the method and path of
    all that was asked.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.in_commit, self.commits, self.private, self.objects, self.requests = False, {}, set(), {}, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def commit(self, name, changes):
        """Adds a commit, as somebody would on the web page."""
        commits = self.commits.setdefault(name, [])
        tree = (commits[-1][1] if commits else {}) | changes
        content = json.dumps([len(commits), sorted((path, sha256(file)) for path, file in tree.items())])
        commits.append((hashlib.sha1(content.encode()).hexdigest(), tree))
        return commits[-1][0]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code="", message=""):
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                if method is not Answer.put_object and self.token not in ("", TOKEN):
                    return self.refuse(401, message="Invalid credentials in Authorization header")
                return method(self, *found.groups(), body)
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def create(self, body):
        request = json.loads(body)
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        if not self.token:
            return self.refuse(401, message="Invalid username or password.")
        if not name.startswith("user/"):
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        status = 409 if name in self.server.commits else 200
        self.server.commits.setdefault(name, [])
        return self.send(status, {"url": f"{self.server.url}/{name}", "name": name})

    def valid(self, body):
        return self.send(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision, body):
        files = json.loads(body)["files"]
        for file in files:
            file |= {"uploadMode": "lfs" if self.is_apart(file["size"]) else "regular", "shouldIgnore": False}
        return self.send(200, {"files": files})

    def is_apart(self, size):
        return size > LARGE and not self.server.in_commit

    def batch(self, name, body):
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}
        return self.send(200, {"transfer": "basic", "objects": objects})

    def put_object(self, oid, body):
        self.server.objects[oid] = body
        return self.send(200 if sha256(body) == oid else 400)

    def post_commit(self, name, revision, body):
        changes, lines = {}, [json.loads(line) for line in body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            else:
                changes[value["path"]] = self.server.objects[value["oid"]]
        oid = self.server.commit(name, changes)
        return self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def found(self, name, revision):
        """The commit that is meant and its files; answers itself, and returns None, where there is none."""
        commits = self.server.commits.get(name)
        if commits is None or (name in self.server.private and self.token != TOKEN):
            # as the hub does: without a token it does not tell whether there is one
            return self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        known = dict(commits) | {"main": commits[-1][1] if commits else {}}
        if revision not in known:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return next(oid for oid, tree in reversed(commits) if tree is known[revision]), known[revision]

    def info(self, name, revision, body):
        if found := self.found(name, revision):
            self.send(200, {"id": name, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, name, revision, body):
        if found := self.found(name, revision):
            self.send(200, [self.entry(path, content) for path, content in found[1].items()])

    def entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if self.is_apart(len(content)):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 100}
        return entry

    def resolve(self, name, revision, path, body):
        if not (found := self.found(name, revision)):
            return None
        if path not in found[1]:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
        content = found[1][path]
        return self.send(200, content, ETag=f'"{sha256(content)}"', X_Repo_Commit=found[0])


ROUTES = {
    r"POST /api/repos/create": Answer.create,
    r"POST /api/validate-yaml": Answer.valid,
    r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)": Answer.preupload,
    r"POST /api/models/([^/]+/[^/]+)/commit/(.+)": Answer.post_commit,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": Answer.batch,
    r"PUT /objects/(\w+)": Answer.put_object,
    r"GET /api/models/([^/]+/[^/]+)/revision/(.+)": Answer.info,
    r"GET /api/models/([^/]+/[^/]+)/tree/(\w+)": Answer.tree,
    r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Answer.resolve,
}
