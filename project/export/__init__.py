"""A checkpoint to ONNX: conversion, quantisation, verification, model card."""
