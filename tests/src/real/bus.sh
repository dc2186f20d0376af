# A bus with one who listens to it all the time, and one caller after the other.
address=unix:path=$PWD/bus
dbus-daemon --config-file bus.conf --nofork --nopidfile &
daemon=$!
until [ -S bus ]; do sleep 0.01; done
dbus-monitor --address "$address" "type='method_call',member='NameHasOwner'" >heard &
monitor=$!
until grep -q NameLost heard; do sleep 0.01; done
count=0
until [ -e stop ]; do
    count=$((count + 1))
    dbus-send --bus="$address" --print-reply --dest=org.freedesktop.DBus /org/freedesktop/DBus \
        org.freedesktop.DBus.NameHasOwner string:"turn.n$count" >answer || exit 1
    grep -q 'boolean false' answer || exit 2
done
kill $monitor
kill $daemon
wait
exit 0
