# Reads everything back with cold caches. Each line of the answer is "word value".
set -u
sync
echo 3 > /proc/sys/vm/drop_caches
cd /srv/work
echo "files $(wc -l < /var/lib/demo.sha256)"
echo "list $(sha256sum < /var/lib/demo.sha256 | cut -d' ' -f1)"
echo "broken $(sha256sum -c --quiet /var/lib/demo.sha256 2>&1 | grep -c .)"
if git fsck --full --strict > /tmp/fsck 2>&1; then echo "fsck whole"; else echo "fsck $(head -n 1 /tmp/fsck)"; fi
echo "commits $(git rev-list --count HEAD)"
echo "status $(git status --porcelain | grep -c .)"
echo "ext4 $(dmesg | grep -ciE 'ext4-fs.*(error|warning|corrupt|checksum)|i/o error')"
