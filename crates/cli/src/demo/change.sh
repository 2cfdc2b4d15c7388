# What the source does after its checkpoint; no fork may see any of it.
set -eu
cd /srv/work
git rm -qr dir00 dir01 && git commit -qm "removed after the checkpoint"
dd if=/dev/urandom of=/srv/random bs=1M count=8 conv=notrunc status=none
rm /var/lib/demo.sha256
# Not who the machine is: a fork is another.
find /srv/work /srv/random /etc /usr/bin /usr/sbin -xdev -type f ! -path /etc/hostname ! -path /etc/hosts ! -path /etc/machine-id -print0 | sort -z | xargs -0 sha256sum > /var/lib/demo.sha256
sync
