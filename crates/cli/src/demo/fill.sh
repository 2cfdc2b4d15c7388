# Fills a sandbox with state on disk and in memory, and prints what must be found again.
set -eu
mkdir -p /srv/work && cd /srv/work
git init -q . && git config user.name demo && git config user.email demo@localhost
python3 - <<'PY'
import hashlib, os, subprocess
for commit in range(5):
    for n in range(600):
        seed = hashlib.sha256(b"%d-%d" % (commit, n)).digest()
        path = "dir%02d/file%d-%03d" % (n % 40, commit, n)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(seed * (16 + n % 500))
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", "state %d" % commit], check=True)
with open("/srv/random", "wb") as file:
    file.write(os.urandom(8 << 20))
PY
# Not who the machine is: a fork is another.
find /srv/work /srv/random /etc /usr/bin /usr/sbin -xdev -type f ! -path /etc/hostname ! -path /etc/hosts ! -path /etc/machine-id -print0 | sort -z | xargs -0 sha256sum > /var/lib/demo.sha256
cat > /usr/local/bin/keeper <<'PY'
#!/usr/bin/python3
"""Keeps random bytes in memory only and answers with their digest and a count of questions."""
import hashlib, os, socket
memory = bytearray(os.urandom(24 << 20))
server = socket.socket(socket.AF_UNIX)
if os.path.exists("/run/keeper.sock"):
    os.unlink("/run/keeper.sock")
server.bind("/run/keeper.sock")
server.listen()
asked = 0
while True:
    client, _ = server.accept()
    wish = client.recv(16)
    asked += 1
    if wish == b"change":
        memory[:4096] = os.urandom(4096)
    client.sendall(b"%s %d %d\n" % (hashlib.sha256(memory).hexdigest().encode(), asked, os.getpid()))
    client.close()
PY
chmod 755 /usr/local/bin/keeper
setsid /usr/local/bin/keeper > /dev/null 2>&1 < /dev/null &
while ! [ -S /run/keeper.sock ]; do sleep 0.05; done
sync
