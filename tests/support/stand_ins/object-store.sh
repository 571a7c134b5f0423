#!/bin/bash
# object-store.sh: an S3 server on port 8333 with the keys of the environment, and its files below
# /data. GET /healthz answers 200: it is an empty bucket that everybody may list.
set -e
root=/data/ceph
conf=$root/ceph.conf
export CEPH_ARGS="--conf $conf"
if [ ! -f $root/made ]; then
  rm -rf $root
  mkdir -p $root/{mon,osd,rgw,run,log}
  cat > $conf <<END
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:5731,v1:127.0.0.1:5732]
public addr = 127.0.0.1
keyring = $root/keyring
run dir = $root/run
admin socket = $root/run/\$name.asok
log file = $root/log/\$name.log
pid file = $root/run/\$name.pid
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
auth allow insecure global id reclaim = false
[mon.a]
mon data = $root/mon
[osd.0]
osd data = $root/osd
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore block create = true
bluestore block db create = false
bluestore block wal create = false
osd memory target = 900000000
[client.rgw]
rgw frontends = beast endpoint=0.0.0.0:8333
END
  key() { ceph-authtool "$root/keyring" --gen-key --name "$@" > /dev/null; }
  touch $root/keyring
  key mon. --cap mon 'allow *'
  key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  key osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
  key client.rgw --cap mon 'allow rwx' --cap osd 'allow rwx'
  fsid=$(sed -n 's/^fsid = //p' $conf)
  monmaptool --create --fsid "$fsid" --addv a '[v2:127.0.0.1:5731,v1:127.0.0.1:5732]' \
    $root/monmap > /dev/null
  ceph-mon -i a --mkfs --monmap $root/monmap --keyring $root/keyring
fi
ceph-mon -i a -f > $root/log/mon.out 2>&1 &
if [ ! -f $root/made ]; then
  osd=$(cat /proc/sys/kernel/random/uuid)
  timeout 60 ceph osd new "$osd" > /dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$osd" > /dev/null 2>&1
fi
ceph-osd -i 0 -f > $root/log/osd.out 2>&1 &
if [ ! -f $root/made ]; then
  timeout 120 radosgw-admin user create --uid store --display-name store \
    --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY" > /dev/null
fi
radosgw -n client.rgw -f > $root/log/rgw.out 2>&1 &
server=$!
trap 'kill $(jobs -p); wait' TERM INT
until wget -q -T 2 -O /dev/null http://127.0.0.1:8333/; do sleep 0.2; done
[ -f $root/made ] || python3 /make-public-bucket.py healthz
touch $root/made
wait $server
