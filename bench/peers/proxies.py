"""nginx and HAProxy: one worker, set up as their documentation says for streams of events."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from bench.peers.base import Command, FromDebian, Peer

NGINX_CONF = """\
{user}
worker_processes 1;
worker_rlimit_nofile 16384;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 32m;
  client_body_buffer_size 256k;
  keepalive_requests 1000000;
  tcp_nodelay on;
  upstream engine {{
    server {upstream};
    keepalive 256;
    keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 1h;
    }}
  }}
}}
"""

HAPROXY_CFG = """\
global
  nbthread 1
  maxconn 7000
defaults
  mode http
  option http-no-delay
  timeout connect 10s
  timeout client 1h
  timeout server 1h
  http-reuse safe
frontend callers
  bind 127.0.0.1:{port} backlog 4096
  default_backend engine
backend engine
  server upstream {upstream}
"""


class Nginx(FromDebian, Peer):
    def version(self) -> str:
        return _number(super().version())

    def command(self, upstream: str, port: int, folder: Path) -> Command:
        conf = folder / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""
        conf.write_text(
            NGINX_CONF.format(
                user=user, folder=folder, port=port, upstream=urlsplit(upstream).netloc
            )
        )
        argv = (str(self.binary), "-p", str(folder), "-e", f"{folder}/error.log", "-c", str(conf))
        return Command(argv, self.libraries)


class HAProxy(FromDebian, Peer):
    def version(self) -> str:
        return _number(super().version())

    def command(self, upstream: str, port: int, folder: Path) -> Command:
        cfg = folder / "haproxy.cfg"
        cfg.write_text(HAPROXY_CFG.format(port=port, upstream=urlsplit(upstream).netloc))
        return Command((str(self.binary), "-db", "-f", str(cfg)), self.libraries)


def _number(said: str) -> str:
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else said


NGINX = Nginx("nginx", "usr/sbin/nginx", ("nginx",))
HAPROXY = HAProxy(
    "haproxy",
    "usr/sbin/haproxy",
    ("haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1", "libpcre2-posix3"),
)
