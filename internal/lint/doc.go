// Package lint holds, as tests, the rules of this repository that general
// linters don't know: which package may import which, who may print, panic or
// exit, and that the documents and the Makefile tell the truth.
package lint
