// Package console shows the fleet over HTTP: a page that stays open, JSON, metrics and
// health. Nothing that changes anything is to be had here; see package control.
//
//	GET /                          the fleet's page
//	GET /clusters/NAME             a cluster's page
//	GET /events, /clusters/NAME/events   what changes on them, as server-sent events
//	GET /assets/FILE               their script, style and icon
//	GET /api/v1/status             a fleet.Report of all clusters
//	GET /api/v1/status/NAME        a fleet.Report of one, with its events
//	GET /api/v1/contents/NAME      its fleet.Contents
//	GET /metrics                   for Prometheus
//	GET /healthz                   200: the process answers
//	GET /readyz                    200: the configuration file is applied; 503, and why not
package console

import (
	"context"

	"github.com/walfleet/walfleet/fleet"
)

// source is what is shown: a fleet.Daemon. All its methods but Contents return at once.
type source interface {
	Report() fleet.Report
	ReportOf(cluster string) (r fleet.Report, ok bool)
	Contents(ctx context.Context, cluster string) (fleet.Contents, error)
	Ready() error
}
