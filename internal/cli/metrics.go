package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

const metricsHeaderTimeout = 10 * time.Second

// metricsServer answers GET /metrics.
type metricsServer struct {
	addr net.Addr
	http *http.Server
	done chan struct{}
}

// startMetrics serves collectors at addr, besides what the process itself tells. Nothing that it answers is secret, but it
// tells what the mount does: elsewhere than on loopback that earns a warning.
func startMetrics(addr string, log *slog.Logger, collect ...prometheus.Collector) (*metricsServer, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, withRemedy(fmt.Errorf("metrics: %w", err), "give --metrics a free HOST:PORT, such as 127.0.0.1:9090")
	}
	if t, ok := l.Addr().(*net.TCPAddr); ok && !t.IP.IsLoopback() {
		log.Warn("metrics are readable by everybody who can reach this address", "addr", l.Addr().String())
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collect...)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	s := &metricsServer{
		addr: l.Addr(),
		http: &http.Server{Handler: mux, ReadHeaderTimeout: metricsHeaderTimeout},
		done: make(chan struct{}),
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Warn("metrics ended", "err", err)
		}
	}()
	log.Info("metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return s, nil
}

func (s *metricsServer) Close(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.done
	return err
}

// metric is one series of a collector: its value is read from a snapshot S.
type metric[S any] struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*S) float64
}

func gauge[S any](name, help string, value func(*S) float64) metric[S] {
	return metric[S]{prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, value}
}

func counter[S any](name, help string, value func(*S) float64) metric[S] {
	return metric[S]{prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue, value}
}

// snapshot is a collector whose series all come from one call of take, so that
// they agree with each other.
type snapshot[S any] struct {
	take    func() S
	metrics []metric[S]
	more    func(*S, chan<- prometheus.Metric) // series with labels; may be nil
	descs   []*prometheus.Desc                 // of those
}

// Describe implements prometheus.Collector.
func (s *snapshot[S]) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range s.metrics {
		ch <- m.desc
	}
	for _, d := range s.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s *snapshot[S]) Collect(ch chan<- prometheus.Metric) {
	v := s.take()
	for _, m := range s.metrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(&v))
	}
	if s.more != nil {
		s.more(&v, ch)
	}
}

var regionErrors = prometheus.NewDesc("memferry_region_errors_total", "Background errors, by kind.", []string{"kind"}, nil)

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// clientCollector exports the statistics of an NBD client.
func clientCollector(take func() nbd.ClientStats) prometheus.Collector {
	type s = nbd.ClientStats
	return &snapshot[s]{
		take: take,
		metrics: []metric[s]{
			gauge("memferry_client_connections", "Connections to the server now.", func(v *s) float64 { return float64(v.Connections) }),
			gauge("memferry_client_in_flight_requests", "Requests without an answer yet.", func(v *s) float64 { return float64(v.InFlight) }),
			counter("memferry_client_requests_total", "Requests sent.", func(v *s) float64 { return float64(v.Requests) }),
			counter("memferry_client_read_bytes_total", "Bytes received.", func(v *s) float64 { return float64(v.ReadBytes) }),
			counter("memferry_client_written_bytes_total", "Bytes sent.", func(v *s) float64 { return float64(v.WriteBytes) }),
			counter("memferry_client_reconnects_total", "Connections made again.", func(v *s) float64 { return float64(v.Reconnects) }),
			counter("memferry_client_resent_total", "Requests sent again after a connection broke.", func(v *s) float64 { return float64(v.Resent) }),
			gauge("memferry_client_rtt_seconds", "Round trip of small requests, 0 if unknown.", func(v *s) float64 { return v.RTT.Seconds() }),
		},
	}
}

// regionCollector exports the statistics of a region.
func regionCollector(take func() region.Stats) prometheus.Collector {
	type s = region.Stats
	return &snapshot[s]{
		take:  take,
		descs: []*prometheus.Desc{regionErrors},
		more: func(v *s, ch chan<- prometheus.Metric) {
			for _, e := range v.Errors {
				ch <- prometheus.MustNewConstMetric(regionErrors, prometheus.CounterValue, float64(e.Count), string(e.Kind))
			}
		},
		metrics: []metric[s]{
			gauge("memferry_region_size_bytes", "Size of the region.", func(v *s) float64 { return float64(v.Size) }),
			gauge("memferry_region_present_bytes", "Bytes that are local.", func(v *s) float64 { return float64(v.Present) }),
			gauge("memferry_region_dirty_bytes", "Bytes that wait to be pushed.", func(v *s) float64 { return float64(v.Dirty) }),
			gauge("memferry_region_fetching_bytes", "Bytes requested from the remote.", func(v *s) float64 { return float64(v.Fetching) }),
			gauge("memferry_region_pushing_bytes", "Bytes sent and not yet accepted.", func(v *s) float64 { return float64(v.Pushing) }),
			counter("memferry_region_pulled_bytes_total", "Bytes moved from the remote.", func(v *s) float64 { return float64(v.PulledBytes) }),
			counter("memferry_region_skipped_bytes_total", "Bytes settled as zero without a transfer.", func(v *s) float64 { return float64(v.SkippedBytes) }),
			counter("memferry_region_pushed_bytes_total", "Bytes accepted by the remote.", func(v *s) float64 { return float64(v.PushedBytes) }),
			counter("memferry_region_dropped_bytes_total", "Bytes fetched and overtaken by a write.", func(v *s) float64 { return float64(v.DroppedBytes) }),
			counter("memferry_region_demand_reads_total", "Requests for what an application waited for.", func(v *s) float64 { return float64(v.DemandReads) }),
			counter("memferry_region_demand_waits_total", "Reads that had to wait for the remote.", func(v *s) float64 { return float64(v.DemandWaits) }),
			gauge("memferry_region_in_flight_bytes", "Background pulls in flight.", func(v *s) float64 { return float64(v.InFlight) }),
			gauge("memferry_region_window_bytes", "How much the link is thought to carry.", func(v *s) float64 { return float64(v.Window) }),
			gauge("memferry_region_rtt_seconds", "Smallest round trip of late, 0 if unknown.", func(v *s) float64 { return v.RTT.Seconds() }),
			gauge("memferry_region_rate_bytes", "Delivery rate of pulls, bytes per second.", func(v *s) float64 { return float64(v.Rate) }),
			gauge("memferry_region_complete", "1 once everything is local.", func(v *s) float64 { return b2f(v.PullComplete) }),
			gauge("memferry_region_remote_up", "1 while the remote answers.", func(v *s) float64 { return b2f(v.RemoteUp) }),
			gauge("memferry_region_changed", "1 if the remote is no longer the one mounted.", func(v *s) float64 { return b2f(v.Changed) }),
		},
	}
}
