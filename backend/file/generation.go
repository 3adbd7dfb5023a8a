package file

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// tick is longer than the kernel's coarse clock, which stamps files, takes
	// from one value to the next (10 ms at CONFIG_HZ=100).
	tick = 11 * time.Millisecond
	// maxTicks bounds how long Generation waits for a file that keeps being
	// written.
	maxTicks = 3
)

// generation makes the tag from what a change of the content changes.
//
// Two changes within one tick of the kernel's clock may leave the same times
// (kernels from 6.13 on avoid it where the filesystem does). So a file that
// was changed within this tick is looked at again in the next one: from then
// on, any change shows.
func (b *Backend) generation(ctx context.Context) (string, error) {
	var st unix.Stat_t
	for i := 0; ; i++ {
		if err := b.control("stat", func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
			return "", err
		}
		settled, err := settled(st.Ctim)
		if err != nil {
			return "", fmt.Errorf("%s: generation: %w", b.f.Name(), err)
		}
		if settled || i == maxTicks {
			break
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(tick):
		}
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()), nil
}

// settled reports whether a change from now on will be stamped otherwise than
// changed. A time in the future, from when the clock was wrong, is.
func settled(changed unix.Timespec) (bool, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return false, err
	}
	age := now.Nano() - changed.Nano()
	return age > 0 || age < -int64(time.Second), nil
}
